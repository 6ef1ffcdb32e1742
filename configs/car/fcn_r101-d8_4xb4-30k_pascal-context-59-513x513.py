_base_ = [
    '../_base_/models/fcn_r50-d8.py',  # FCN with ResNet-50, output stride 8
    '../_base_/datasets/pascal_context_59_513x513_brightness.py',  # 59 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_30k_wd1e-4.py'  # SGD, lr 0.01, wd 1e-4, 30k
]
crop_size = (513, 513)
data_preprocessor = dict(size=crop_size, test_cfg=dict(size=crop_size))
head_norm_cfg = dict(type='SyncBN', eps=1e-3, requires_grad=True)
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained='open-mmlab://resnet101_v1c',
    backbone=dict(depth=101, multi_grid=(4, 8, 16)),  # 4 times 1, 2, 4
    decode_head=dict(
        concat_input=False,
        dropout_ratio=0.,
        norm_cfg=head_norm_cfg,
        align_corners=True,
        num_classes=59),
    auxiliary_head=None)
