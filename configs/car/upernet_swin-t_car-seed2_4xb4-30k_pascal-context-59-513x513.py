_base_ = './upernet_swin-t_4xb4-30k_pascal-context-59-513x513.py'
# Class-aware regularization in the place of the convolution behind the fusion, fpn_bottleneck.
model = dict(type='CAREncoderDecoder', car=dict(pool=2))
# A run of table 4.8: the same numbers on the same machine.
randomness = dict(seed=2, deterministic=True)
