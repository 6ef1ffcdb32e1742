_base_ = './upernet_swin-t_4xb4-30k_pascal-context-59-513x513.py'
# Row S5 of table 4.1: all three losses, the 3x3 convolution is kept.
model = dict(type='CAREncoderDecoder', car=dict(pool=2, kernel_size=3))
