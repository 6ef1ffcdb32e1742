_base_ = './upernet_swin-l_4xb4-30k_coco-stuff10k-513x513.py'
# Class-aware regularization in the place of the convolution behind the fusion, fpn_bottleneck.
model = dict(type='CAREncoderDecoder', car=dict(pool=2))
