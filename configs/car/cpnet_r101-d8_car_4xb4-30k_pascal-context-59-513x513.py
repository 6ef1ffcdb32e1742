_base_ = './cpnet_r101-d8_4xb4-30k_pascal-context-59-513x513.py'
# Class-aware regularization in the place of the convolution behind the concatenation, bottleneck.
model = dict(type='CAREncoderDecoder', car=dict())
