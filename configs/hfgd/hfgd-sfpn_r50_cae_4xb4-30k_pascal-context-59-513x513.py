_base_ = './sfpn_r50_4xb4-30k_pascal-context-59-513x513.py'
model = dict(
    type='CAREncoderDecoder',
    car=dict(layer='encoder.out_conv'),
    decode_head=dict(
        encoder=dict(
            _delete_=True,
            type='ContextAugmentedEncoder',
            wide_channels=2048,
            attention_channels=512,
            qk_channels=64),
        guidance=True,
        axial_attention=True))
