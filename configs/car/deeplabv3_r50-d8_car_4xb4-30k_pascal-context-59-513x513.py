_base_ = './deeplabv3_r50-d8_4xb4-30k_pascal-context-59-513x513.py'
# Class-aware regularization in the place of the convolution behind the pyramid, bottleneck.
model = dict(type='CAREncoderDecoder', car=dict(channels=256))
