_base_ = './sa_r50-d8_4xb4-30k_pascal-context-59-513x513.py'
# Row R7 of table 4.1: intra-class and centre-to-centre loss, 1x1 convolution.
model = dict(
    type='CAREncoderDecoder',
    car=dict(loss=dict(type='ClassAwareRegularization', inter_c2p_weight=0.0)))
