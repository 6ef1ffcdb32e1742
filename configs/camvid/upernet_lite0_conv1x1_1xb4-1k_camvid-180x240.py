_base_ = './upernet_lite0_1xb4-1k_camvid-180x240.py'
# What CAR does to the head, without its losses: a 1x1 convolution in the place of the 3x3.
model = dict(type='CAREncoderDecoder', car=dict(linear=False, loss=None))
