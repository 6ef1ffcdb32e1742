_base_ = [
    '../_base_/models/upernet_swin.py',  # UPerNet with Swin-T
    '../_base_/datasets/pascal_context_59_513x513_brightness.py',  # 59 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_30k_wd1e-4.py'  # SGD, lr 0.01, wd 1e-4, 30k
]
crop_size = (513, 513)
data_preprocessor = dict(size=crop_size, test_cfg=dict(size=crop_size))
checkpoint_file = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/swin/swin_tiny_patch4_window7_224_20220317-1cdeb081.pth'
head_norm_cfg = dict(type='SyncBN', eps=1e-3, requires_grad=True)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file)),
    decode_head=dict(
        dropout_ratio=0.,
        norm_cfg=head_norm_cfg,
        align_corners=True,
        num_classes=59),
    auxiliary_head=None)
