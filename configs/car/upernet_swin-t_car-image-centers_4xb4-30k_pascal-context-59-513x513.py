_base_ = './upernet_swin-t_4xb4-30k_pascal-context-59-513x513.py'
# Class centres of each image instead of the batch.
model = dict(
    type='CAREncoderDecoder',
    car=dict(pool=2, loss=dict(type='ClassAwareRegularization', centers='image')))
