_base_ = './ccnet_r50-d8_4xb4-30k_coco-stuff10k-513x513.py'
# Class-aware regularization in the place of the convolution behind the concatenation, conv_cat.
model = dict(type='CAREncoderDecoder', car=dict())
