_base_ = './upernet_swin-t_4xb4-30k_pascal-context-59-513x513.py'
# Row S2 of table 4.1: a 1x1 convolution in the place of the 3x3, nothing is regularized.
model = dict(type='CAREncoderDecoder', car=dict(pool=2, linear=False, loss=None))
