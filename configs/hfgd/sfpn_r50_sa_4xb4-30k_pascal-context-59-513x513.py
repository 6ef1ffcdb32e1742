_base_ = './sfpn_r50_4xb4-30k_pascal-context-59-513x513.py'
model = dict(
    decode_head=dict(
        encoder=dict(_delete_=True, type='SAHead', channels=512, qk_channels=64)))
