_base_ = [
    '../_base_/models/sa_r50-d8.py',  # self-attention with ResNet-50, output stride 8
    '../_base_/datasets/pascal_context_59_513x513_brightness.py',  # 59 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_30k_car.py'  # SGD, lr 0.01, wd 2e-4 where the authors have it, 30k
]
crop_size = (513, 513)
data_preprocessor = dict(size=crop_size, test_cfg=dict(size=crop_size))
# Momentum as PyTorch means it: the authors' 0.9997.
head_norm_cfg = dict(type='SyncBN', eps=1e-3, momentum=0.0003, requires_grad=True)
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained='open-mmlab://resnet101_v1c',
    backbone=dict(
        depth=101,
        multi_grid=(4, 8, 16),  # 4 times 1, 2, 4
        norm_cfg=dict(momentum=0.0003)),
    decode_head=dict(
        dropout_ratio=0.,
        # The classifier's start: Keras' default, which the authors keep.
        init_cfg=dict(type='Xavier', distribution='uniform', override=dict(name='conv_seg')),
        norm_cfg=head_norm_cfg,
        num_classes=59),
    auxiliary_head=None)
