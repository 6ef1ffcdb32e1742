_base_ = './sfpn_r50_4xb4-30k_pascal-context-59-513x513.py'
# Output stride 8; ASPP, the extra encoding, is part of the upsampler.
model = dict(
    backbone=dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), multi_grid=(4, 8, 16)),
    decode_head=dict(
        upsampler=dict(
            type='DepthwiseSeparableASPPHead',
            in_index=3,
            c1_in_channels=256,
            c1_channels=48,
            dilations=(1, 12, 24, 36))))
