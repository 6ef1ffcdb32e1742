# ESeg-S (slides' table 3): EfficientNet-B1, BiFPN with 96 channels, 4 repeats, on P2 to P9.
# Chosen, the slides do not say: norm, drop path, dropout, activation of the head, and the numbers
# of OHEM.
# Batch norm of EfficientDet: its momentum of 0.99 is PyTorch's 0.01.
norm_cfg = dict(type='SyncBN', momentum=0.01, eps=1e-3, requires_grad=True)
# ImageNet-1K with AutoAugment, of mmpretrain. Its scaling (1.0, 1.1) is B1's, so these weights fit.
checkpoint_file = 'https://download.openmmlab.com/mmclassification/v0/efficientnet/efficientnet-b1_3rdparty_8xb32-aa_in1k_20220119-619d8ae3.pth'
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
    backbone=dict(
        type='ScaledEfficientNet',
        width=1.0,
        depth=1.1,
        drop_path_rate=0.2,
        norm_cfg=norm_cfg,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file, prefix='backbone.')),
    neck=dict(
        type='BiFPN',
        in_channels=[24, 40, 112, 320],
        channels=96,
        num_repeats=4,
        num_levels=8,
        norm_cfg=norm_cfg,
        act_cfg=dict(type='Swish')),
    decode_head=dict(
        type='ESegHead',
        in_channels=[96] * 8,
        in_index=list(range(8)),
        channels=96,
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=norm_cfg,
        act_cfg=dict(type='Swish'),
        align_corners=False,
        # OHEM: pixels whose class has less than 0.7, at least a sixteenth of 1024 x 2048.
        sampler=dict(type='OHEMPixelSampler', thresh=0.7, min_kept=131072),
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
