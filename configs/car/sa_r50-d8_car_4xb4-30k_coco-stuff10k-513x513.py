_base_ = './sa_r50-d8_4xb4-30k_coco-stuff10k-513x513.py'
# Class-aware regularization in the place of the last convolution, out_conv. Between centres half
# the default margin, against many classes.
model = dict(
    type='CAREncoderDecoder',
    car=dict(loss=dict(type='ClassAwareRegularization', inter_c2c_margin=0.25)))
