# Axial attention without channelization, the baseline of CAA.
_base_ = [
    '../_base_/models/lite0.py',  # EfficientNet-Lite0, pretrained on ImageNet, here at output stride 16
    '../_base_/datasets/camvid_180x240.py',  # 367 training images in data/camvid, at half size
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_1k_pretrained.py'  # AdamW, 1000 iterations
]
crop_size = (180, 240)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(output_stride=16),
    decode_head=dict(
        type='CAAHead',
        attention='axial',
        attention_channels=64,
        qk_channels=16,
        gate_channels=32))
