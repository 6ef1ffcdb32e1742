_base_ = './sa_r50-d8_4xb4-30k_pascal-context-59-513x513.py'
# Class centres are moving averages over the batches, 0.99 of the old and 0.01 of the new.
model = dict(
    type='CAREncoderDecoder',
    car=dict(loss=dict(type='ClassAwareRegularization', moving_average=0.99, channels=512)))
