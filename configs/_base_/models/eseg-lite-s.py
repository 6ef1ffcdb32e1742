# ESeg-Lite-S (slides' table 3): fused blocks, ReLU, no squeeze and excitation; BiFPN with 64
# channels, once, on P2 to P9.
# Chosen, the slides do not say: norm, no drop path, dropout, and the numbers of OHEM.
# Batch norm of EfficientDet: its momentum of 0.99 is PyTorch's 0.01.
norm_cfg = dict(type='SyncBN', momentum=0.01, eps=1e-3, requires_grad=True)
act_cfg = dict(type='ReLU')
data_preprocessor = dict(
    type='SegDataPreProcessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=data_preprocessor,
    # From scratch: no weights of fused blocks are published in these sizes. Lite-L has B0's width
    # and depth, but other blocks. Own ones: init_cfg of the backbone.
    backbone=dict(
        type='ScaledEfficientNet',
        width=0.4,
        depth=0.6,
        variant='lite',
        drop_path_rate=0.0,
        norm_cfg=norm_cfg),
    neck=dict(
        type='BiFPN',
        in_channels=[16, 16, 48, 128],
        channels=64,
        num_repeats=1,
        num_levels=8,
        norm_cfg=norm_cfg,
        act_cfg=act_cfg),
    decode_head=dict(
        type='ESegHead',
        in_channels=[64] * 8,
        in_index=list(range(8)),
        channels=64,
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=norm_cfg,
        act_cfg=act_cfg,
        align_corners=False,
        # OHEM: pixels whose class has less than 0.7, at least a sixteenth of 1024 x 2048.
        sampler=dict(type='OHEMPixelSampler', thresh=0.7, min_kept=131072),
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
