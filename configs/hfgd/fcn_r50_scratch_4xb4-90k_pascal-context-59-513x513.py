_base_ = './fcn_r50_4xb4-30k_pascal-context-59-513x513.py'
# Random initial weights, 3 times as long.
model = dict(pretrained=None)
param_scheduler = [
    dict(type='PolyLR', eta_min=0., power=0.9, begin=0, end=90000, by_epoch=False)
]
train_cfg = dict(max_iters=90000, val_interval=9000)
default_hooks = dict(checkpoint=dict(interval=9000))
