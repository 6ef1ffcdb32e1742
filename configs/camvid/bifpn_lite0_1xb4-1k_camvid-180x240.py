# ESeg's fusion on the backbone of the DeepLabV3+ beside it: P2 to P7, which has 2 x 2 pixels.
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
    neck=dict(
        type='BiFPN',
        in_channels=[24, 40, 112, 320],
        channels=64,
        num_repeats=4,
        num_levels=6,
        norm_cfg=dict(type='BN', requires_grad=True),
        act_cfg=dict(type='Swish')),
    decode_head=dict(
        type='ESegHead',
        in_channels=[64] * 6,
        in_index=list(range(6)),
        act_cfg=dict(type='Swish')),
    # The neck has replaced the backbone's levels, which it reads in the other models.
    auxiliary_head=None)
