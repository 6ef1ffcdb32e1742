_base_ = './danet_r101-d8_4xb4-30k_pascal-context-59-513x513.py'
# Class-aware regularization in the place of the last convolution of both branches, pam_out_conv
# and cam_out_conv.
model = dict(type='CAREncoderDecoder', car=dict())
