_base_ = [
    '../_base_/models/upernet_twins-svt.py',  # UPerNet with Twins-SVT-S
    '../_base_/datasets/pascal_voc12_aug.py',  # VOC 2012 with the augmented training set, 21 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_160k_adamw.py'  # AdamW, lr 6e-5, wd 0.01, 160k
]
crop_size = (512, 512)
data_preprocessor = dict(size=crop_size)
checkpoint_file = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/twins/alt_gvt_small_20220308-7e1c3695.pth'
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        embed_dims=[64, 128, 256, 512],
        depths=[2, 2, 10, 4],
        num_heads=[2, 4, 8, 16],
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file)),
    decode_head=dict(in_channels=[64, 128, 256, 512], num_classes=21),
    auxiliary_head=dict(in_channels=256, num_classes=21))
