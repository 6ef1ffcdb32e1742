_base_ = './upernet_swin-t_4xb4-30k_pascal-context-59-513x513.py'
# Class centres are moving averages over the batches, 0.99 of the old and 0.01 of the new.
model = dict(
    type='CAREncoderDecoder',
    car=dict(pool=2, loss=dict(type='ClassAwareRegularization', moving_average=0.99, channels=512)))
