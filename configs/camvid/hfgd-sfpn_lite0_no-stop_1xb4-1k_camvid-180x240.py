# Guided Semantic FPN with axial attention, and every stop-gradient removed (HFGD, section 5.2).
_base_ = [
    '../_base_/models/lite0.py',  # EfficientNet-Lite0, pretrained on ImageNet
    '../_base_/datasets/camvid_180x240.py',  # 367 training images in data/camvid, at half size
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_1k_pretrained.py'  # AdamW, 1000 iterations
]
crop_size = (180, 240)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(
        type='HFGDHead',
        in_channels=[24, 40, 112, 320],
        in_index=[0, 1, 2, 3],
        upsampler=dict(type='SemanticFPNHead'),
        encoder=None,
        guidance=True,
        axial_attention=True,
        stop_gradient=False),
    auxiliary_head=None)
