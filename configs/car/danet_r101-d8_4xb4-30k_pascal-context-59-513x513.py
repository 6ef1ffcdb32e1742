_base_ = [
    '../_base_/models/danet_r50-d8.py',  # DANet with ResNet-50, output stride 8
    '../_base_/datasets/pascal_context_59_513x513.py',  # Pascal Context, 59 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_30k_wd2e-4.py'  # SGD, lr 0.01, wd 2e-4, 30k
]
crop_size = (513, 513)
# Images are padded to the crop's size at test, too.
data_preprocessor = dict(size=crop_size, test_cfg=dict(size=crop_size))
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained='open-mmlab://resnet101_v1c',
    backbone=dict(depth=101, multi_grid=(4, 8, 16)),  # 4 times 1, 2, 4
    decode_head=dict(
        num_classes=59,
        dropout_ratio=0,
        norm_cfg=dict(eps=1e-3),
        align_corners=True),
    auxiliary_head=None)
