_base_ = './fcn_r50_4xb4-30k_coco-stuff10k-513x513.py'
# Random initial weights, 6 times as long.
model = dict(pretrained=None)
param_scheduler = [
    dict(type='PolyLR', eta_min=0., power=0.9, begin=0, end=180000, by_epoch=False)
]
train_cfg = dict(max_iters=180000, val_interval=18000)
default_hooks = dict(checkpoint=dict(interval=18000))
