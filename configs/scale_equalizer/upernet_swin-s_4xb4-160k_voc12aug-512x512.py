_base_ = [
    '../_base_/models/upernet_swin.py',  # UPerNet with Swin-T
    '../_base_/datasets/pascal_voc12_aug.py',  # VOC 2012 with the augmented training set, 21 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_160k_adamw.py'  # AdamW, lr 6e-5, wd 0.01, 160k
]
crop_size = (512, 512)
data_preprocessor = dict(size=crop_size)
checkpoint_file = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/swin/swin_small_patch4_window7_224_20220317-7ba6d6dd.pth'
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        embed_dims=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file)),
    decode_head=dict(in_channels=[96, 192, 384, 768], num_classes=21),
    auxiliary_head=dict(in_channels=384, num_classes=21))
