_base_ = './upernet_swin-t_4xb4-30k_coco-stuff10k-513x513.py'
# Class-aware regularization in the place of the convolution behind the fusion, fpn_bottleneck.
# Between centres half the default margin, against many classes.
model = dict(
    type='CAREncoderDecoder',
    car=dict(pool=2, loss=dict(type='ClassAwareRegularization', inter_c2c_margin=0.25)))
