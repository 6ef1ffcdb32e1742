_base_ = './sa_r50-d8_4xb4-30k_pascal-context-59-513x513.py'
# Row R4 of table 4.1: intra-class and centre-to-centre loss, the 3x3 convolution is kept.
model = dict(
    type='CAREncoderDecoder',
    car=dict(kernel_size=3, loss=dict(type='ClassAwareRegularization', inter_c2p_weight=0.0)))
