# CAA with EfficientNet-B7, output stride 8.
norm_cfg = dict(type='SyncBN', eps=1e-3, requires_grad=True)
# ImageNet-1K with AutoAugment, of mmpretrain. Trained with noisy student, on further images:
# efficientnet-b7_3rdparty-ra-noisystudent_in1k_20221103-a82894bc.pth in the same folder.
checkpoint_file = 'https://download.openmmlab.com/mmclassification/v0/efficientnet/efficientnet-b7_3rdparty_8xb32-aa_in1k_20220119-bf03951c.pth'
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
        type='DilatedEfficientNet',
        arch='b7',
        output_stride=8,
        drop_path_rate=0.5,
        # Stride 4, and the last 1x1 convolution.
        out_indices=(2, 6),
        norm_cfg=norm_cfg,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file, prefix='backbone.')),
    decode_head=dict(
        type='CAAHead',
        in_channels=2560,
        in_index=1,
        channels=256,
        attention='channelized_axial',
        attention_channels=512,
        qk_channels=64,
        gate_channels=128,
        gate_layers=5,
        image_level=True,
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=2560,
        in_index=1,
        channels=256,
        num_convs=1,
        kernel_size=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
