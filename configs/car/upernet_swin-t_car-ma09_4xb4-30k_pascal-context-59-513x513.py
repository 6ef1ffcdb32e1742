_base_ = './upernet_swin-t_4xb4-30k_pascal-context-59-513x513.py'
# Class centres are moving averages over the batches, 0.9 of the old and 0.1 of the new.
model = dict(
    type='CAREncoderDecoder',
    car=dict(pool=2, loss=dict(type='ClassAwareRegularization', moving_average=0.9, channels=512)))
