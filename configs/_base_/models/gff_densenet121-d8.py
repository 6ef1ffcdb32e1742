# GFFNet on DenseASPP with DenseNet-121, output stride 8.
norm_cfg = dict(type='SyncBN', requires_grad=True)
# ImageNet-1K, torchvision's weights with the names of mmpretrain.
checkpoint_file = 'https://download.openmmlab.com/mmclassification/v0/densenet/densenet121_4xb256_in1k_20220426-07450f99.pth'
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
        type='DilatedDenseNet',
        arch='121',
        output_stride=8,
        out_indices=(0, 1, 2, 3),
        norm_cfg=norm_cfg,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file, prefix='backbone.')),
    decode_head=dict(
        type='GFFHead',
        in_channels=[256, 512, 1024, 1024],
        in_index=[0, 1, 2, 3],
        channels=256,
        neck=dict(fusion='gff'),
        context=dict(
            type='DenseASPPHead',
            channels=None,  # the concatenation
            dilations=(3, 6, 12, 18, 24),
            # The authors' widths for DenseNet-121.
            reduced_channels=512,
            bottleneck_channels=128,
            branch_channels=64),
        dfp=None,
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    # The auxiliary loss of section "Network Architecture", on stage 3.
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=1024,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
