# Semantic FPN with axial attention, unguided.
_base_ = [
    '../_base_/models/r18-d8.py',  # ResNet-18, here at output stride 32, from scratch
    '../_base_/datasets/fusion_shapes.py',  # 512 training scenes, 64 held out
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_1k.py'  # AdamW, 1000 iterations
]
crop_size = (128, 128)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(strides=(1, 2, 2, 2), dilations=(1, 1, 1, 1)),
    decode_head=dict(
        type='HFGDHead',
        in_channels=[64, 128, 256, 512],
        in_index=[0, 1, 2, 3],
        channels=32,
        upsampler=dict(type='SemanticFPNHead'),
        encoder=None,
        guidance=False,
        axial_attention=True,
        num_classes=8),
    auxiliary_head=None)
