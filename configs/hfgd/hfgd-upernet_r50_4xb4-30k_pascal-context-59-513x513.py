_base_ = './sfpn_r50_4xb4-30k_pascal-context-59-513x513.py'
# Pyramid pooling, the extra encoding, is part of the upsampler.
model = dict(
    decode_head=dict(
        upsampler=dict(type='UPerHead', pool_scales=(1, 2, 3, 6)),
        guidance=True,
        axial_attention=True))
