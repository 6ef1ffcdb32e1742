_base_ = [
    '../_base_/models/upernet_swin.py',  # UPerNet with Swin-T
    '../_base_/datasets/ade20k.py',  # ADE20K, 150 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_160k_adamw.py'  # AdamW, lr 6e-5, wd 0.01, 160k
]
crop_size = (512, 512)
data_preprocessor = dict(size=crop_size)
checkpoint_file = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/swin/swin_base_patch4_window7_224_20220317-e9b98025.pth'
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        embed_dims=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file)),
    decode_head=dict(in_channels=[128, 256, 512, 1024], num_classes=150),
    auxiliary_head=dict(in_channels=512, num_classes=150))
