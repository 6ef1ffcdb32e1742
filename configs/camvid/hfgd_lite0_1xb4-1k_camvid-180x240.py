# U-SFPN and context-augmented encoder, guidance and axial attention: all of HFGD.
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
    type='CAREncoderDecoder',
    car=dict(layer='encoder.out_conv'),
    decode_head=dict(
        type='HFGDHead',
        in_channels=[24, 40, 112, 320],
        in_index=[0, 1, 2, 3],
        upsampler=dict(type='USFPNHead'),
        encoder=dict(
            type='ContextAugmentedEncoder',
            wide_channels=256,
            attention_channels=64,
            qk_channels=16),
        guidance=True,
        axial_attention=True),
    auxiliary_head=None)
