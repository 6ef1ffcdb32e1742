_base_ = './sa_r50-d8_4xb4-30k_pascal-context-59-513x513.py'
# Class centres of each image instead of the batch.
model = dict(
    type='CAREncoderDecoder',
    car=dict(loss=dict(type='ClassAwareRegularization', centers='image')))
