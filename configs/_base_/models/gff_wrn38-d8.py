# GFFNet on DeepLabV3+ with WiderResNet-38, output stride 8, as the authors released it: three levels,
# the last of which is ASPP; sequential update; a gate per channel, from the unreduced level.
norm_cfg = dict(type='SyncBN', requires_grad=True)
# Made by tools/model_converters/wider_resnet.py from the published weights, of ImageNet or Mapillary.
checkpoint_file = 'checkpoints/wider_resnet38.pth'
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
        type='WiderResNet',
        depth=38,
        output_stride=8,
        out_indices=(2, 5, 7),  # strides 2, 8, 8
        norm_cfg=norm_cfg,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file)),
    decode_head=dict(
        type='GFFHead',
        in_channels=[128, 1024],
        in_index=[0, 1],
        channels=256,
        neck=dict(
            fusion='gff',
            channels=128,
            update='sequential',
            gate='channel',
            gate_input='raw',
            num_convs=0),
        context=dict(
            type='LinearASPPHead',
            in_channels=4096,
            in_index=2,
            channels=256,
            dilations=(1, 12, 24, 36)),
        fuse_context=True,
        dfp='dilated',
        num_convs=2,
        kernel_size=3,
        dropout_ratio=0,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    # The authors' model has no auxiliary head.
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
