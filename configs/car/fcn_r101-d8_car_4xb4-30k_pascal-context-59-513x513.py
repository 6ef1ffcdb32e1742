_base_ = './fcn_r101-d8_4xb4-30k_pascal-context-59-513x513.py'
# Class-aware regularization in the place of the second convolution, convs.1.
model = dict(type='CAREncoderDecoder', car=dict())
