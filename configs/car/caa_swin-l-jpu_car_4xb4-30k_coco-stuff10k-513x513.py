_base_ = './caa_swin-l-jpu_4xb4-30k_coco-stuff10k-513x513.py'
# Class-aware regularization in the place of the convolution behind the concatenation, bottleneck.
model = dict(type='CAREncoderDecoder', car=dict(channels=256))
