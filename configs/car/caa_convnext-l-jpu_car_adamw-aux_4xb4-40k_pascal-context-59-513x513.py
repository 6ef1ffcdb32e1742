_base_ = './caa_convnext-l-jpu_car_adamw-aux_4xb4-30k_pascal-context-59-513x513.py'
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=1500, by_epoch=False),
    dict(type='PolyLR', eta_min=0.0, power=0.9, begin=1500, end=40000, by_epoch=False)
]
train_cfg = dict(max_iters=40000)
