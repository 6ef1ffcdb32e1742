_base_ = [
    '../_base_/models/eseg-lite-s.py',  # ESeg-Lite-S
    '../_base_/datasets/camvid.py',  # 367 training images in data/camvid
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_4k.py'  # AdamW, 4000 iterations
]
crop_size = (360, 480)
data_preprocessor = dict(size=crop_size)
# BN, not SyncBN: the same file runs on a CPU and with gloo. From scratch.
norm_cfg = dict(type='BN', momentum=0.01, eps=1e-3, requires_grad=True)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    decode_head=dict(
        num_classes=11,
        norm_cfg=norm_cfg,
        # None of the other models of this folder has it either.
        sampler=None))
