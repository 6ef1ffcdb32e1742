_base_ = './sfpn_r50_4xb4-30k_pascal-context-59-513x513.py'
# The rates: a quarter of those for output stride 8 (chosen).
model = dict(
    decode_head=dict(
        encoder=dict(
            _delete_=True, type='ASPPHead', channels=256, dilations=(1, 3, 6, 9))))
