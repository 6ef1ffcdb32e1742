_base_ = './sa_r50_4xb4-30k_pascal-context-59-513x513.py'
# Class-aware regularization in the place of the last convolution, out_conv.
model = dict(type='CAREncoderDecoder', car=dict())
