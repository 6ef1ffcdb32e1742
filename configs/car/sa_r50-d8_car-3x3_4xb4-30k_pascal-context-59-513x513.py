_base_ = './sa_r50-d8_4xb4-30k_pascal-context-59-513x513.py'
# Row R5 of table 4.1: all three losses, the 3x3 convolution is kept.
model = dict(type='CAREncoderDecoder', car=dict(kernel_size=3))
