_base_ = './sfpn_r50_4xb4-30k_pascal-context-59-513x513.py'
# Semantic FPN on the feature-aligned pyramid.
model = dict(
    decode_head=dict(
        upsampler=dict(
            pyramid=dict(type='FaPN', norm_cfg=dict(type='SyncBN', eps=1e-3, requires_grad=True)))))
