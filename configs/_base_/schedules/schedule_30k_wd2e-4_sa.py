# The recipe of CAR's self-attention rows: SGD, polynomial decay to 0, 30000 iterations, validated and saved ten
# times. The authors' l2(1e-4) adds 1e-4 times the sum of squares to the loss: a weight decay of 2e-4.
optimizer = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0002)
# The authors' code registers the decay of the layers that exist before the network first runs: the
# first convolution, query, key and value, and the classifier; kernels alone.
decayed = dict(decay_mult=1.0)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=optimizer,
    clip_grad=None,
    paramwise_cfg=dict(
        custom_keys={
            # The longest key that is part of a parameter's name decides.
            'backbone': dict(decay_mult=0.0),
            'head': dict(decay_mult=0.0),
            'decode_head.in_conv.conv.weight': decayed,
            'decode_head.attention.query_key.query.conv.weight': decayed,
            'decode_head.attention.query_key.key.conv.weight': decayed,
            'decode_head.attention.value.conv.weight': decayed,
            'decode_head.conv_seg.weight': decayed,
        }))

param_scheduler = [
    dict(type='PolyLR', eta_min=0.0, power=0.9, begin=0, end=30000, by_epoch=False)
]

train_cfg = dict(type='IterBasedTrainLoop', max_iters=30000, val_interval=3000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=3000),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'))
