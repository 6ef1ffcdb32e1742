_base_ = './upernet_swin-t_4xb4-30k_pascal-context-59-513x513.py'
# Section 4.4.2.3: the convolution behind the pyramid pooling is 1x1 in the place of 3x3.
model = dict(
    type='CAREncoderDecoder',
    car=dict(pool=2),
    decode_head=dict(type='PointwiseUPerHead'))
