# The recipe of CAR's released configs for self-attention behind ResNet: SGD, one learning rate,
# polynomial decay to 0 without warm-up, 30000 iterations, validated and saved ten times.
# Their Keras l2(1e-4) has the gradient 2e-4 w, and reaches the kernels of those layers alone that
# exist before the weights are built: first convolution, query, key, value, last convolution and
# classifier of the head, not the pretrained backbone and not the layers of CAR.
optimizer = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0002)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=optimizer,
    clip_grad=None,
    paramwise_cfg=dict(
        norm_decay_mult=0.,
        bias_decay_mult=0.,
        custom_keys={
            'backbone': dict(decay_mult=0.),
            'out_conv.linear': dict(decay_mult=0.),
            'out_conv.project': dict(decay_mult=0.)
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
