# Cosine decay and an average of the weights, 80000 iterations. ESeg's slides name the cosine and
# batches of 16. The rest is chosen: rate (0.08 for 64 images), momentum, weight decay, clipping
# and the average are EfficientDet's; iterations and warm-up are ours.
optimizer = dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=4e-5)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=optimizer,
    clip_grad=dict(max_norm=10.0),
    # Kernels alone decay; 'weights' are those of BiFPN's edges and of the head's levels.
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={'weights': dict(decay_mult=0.0)}))

param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=1000, by_epoch=False),
    dict(
        type='CosineAnnealingLR',
        eta_min=0.0,
        T_max=79000,
        begin=1000,
        end=80000,
        by_epoch=False)
]

train_cfg = dict(type='IterBasedTrainLoop', max_iters=80000, val_interval=8000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=8000),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'))

# Chosen: a decay of min(0.9998, n / (10 + n)) in step n, about EfficientDet's, and of the batch
# statistics as well. The average is what is validated, and what a checkpoint has as state_dict.
custom_hooks = [
    dict(
        type='EMAHook',
        ema_type='MomentumAnnealingEMA',
        momentum=0.0002,
        gamma=10,
        update_buffers=True,
        priority='ABOVE_NORMAL')
]
