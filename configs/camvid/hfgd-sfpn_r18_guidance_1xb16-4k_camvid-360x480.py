# Guided Semantic FPN, without axial attention.
_base_ = [
    '../_base_/models/r18-d8.py',  # ResNet-18, here at output stride 32, from scratch
    '../_base_/datasets/camvid.py',  # 367 training images in data/camvid
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_4k.py'  # AdamW, 4000 iterations
]
crop_size = (360, 480)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(strides=(1, 2, 2, 2), dilations=(1, 1, 1, 1)),
    decode_head=dict(
        type='HFGDHead',
        in_channels=[64, 128, 256, 512],
        in_index=[0, 1, 2, 3],
        channels=64,
        upsampler=dict(type='SemanticFPNHead'),
        encoder=None,
        guidance=True,
        axial_attention=False,
        num_classes=11),
    auxiliary_head=None)
