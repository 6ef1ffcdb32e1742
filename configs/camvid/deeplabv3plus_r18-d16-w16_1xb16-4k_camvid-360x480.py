# As many multiply-adds as ESeg-Lite-S, by its widths: 16 instead of 64 channels in the first stage.
_base_ = [
    '../_base_/models/r18-d8.py',  # ResNet-18, here with output stride 16, from scratch
    '../_base_/datasets/camvid.py',  # 367 training images in data/camvid
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_4k.py'  # AdamW, 4000 iterations
]
crop_size = (360, 480)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        base_channels=16,
        stem_channels=16,
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2)),
    decode_head=dict(
        type='DepthwiseSeparableASPPHead',
        in_channels=128,
        channels=56,
        dilations=(1, 6, 12, 18),
        c1_in_channels=16,
        c1_channels=24,
        num_classes=11),
    # ESeg has none.
    auxiliary_head=None)
